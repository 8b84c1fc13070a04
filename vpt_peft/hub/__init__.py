"""Push and pull of adapters, provenance of the backbone, model cards."""

from .card import CARD_NAME, update_card, write_card
from .card_content import CARD_DETAILS, CardContent, render_card
from .endpoint_files import write_endpoint_files
from .provenance import (
    add_provenance,
    resolve_commit,
    warn_if_local,
    warn_if_revision_differs,
    without_local_backbone,
)
from .repo_ids import check_model_name, is_folder, is_repo_id, similar_folder
from .transfer import (
    PREPROCESSOR_NAME,
    fetch_cards,
    find_commit,
    full_repo_id,
    pull,
    pulled,
    pulled_adapter,
    push,
    suggest_login,
    tensor_names,
)
from .usage import BACKBONE_CLASSES, PIPELINES

__all__ = [
    "BACKBONE_CLASSES",
    "CARD_DETAILS",
    "CARD_NAME",
    "PIPELINES",
    "PREPROCESSOR_NAME",
    "CardContent",
    "add_provenance",
    "check_model_name",
    "fetch_cards",
    "find_commit",
    "full_repo_id",
    "is_folder",
    "is_repo_id",
    "pull",
    "pulled",
    "pulled_adapter",
    "push",
    "render_card",
    "resolve_commit",
    "similar_folder",
    "suggest_login",
    "tensor_names",
    "update_card",
    "warn_if_local",
    "warn_if_revision_differs",
    "without_local_backbone",
    "write_card",
    "write_endpoint_files",
]
