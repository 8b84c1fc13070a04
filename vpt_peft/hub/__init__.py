"""Push and pull of adapters, provenance of the backbone, model cards."""

from .card import CARD_DETAILS, CARD_NAME, render_card, update_card, write_card
from .provenance import add_provenance, resolve_commit, warn_if_local, warn_if_revision_differs
from .repo_ids import is_folder, is_repo_id
from .transfer import fetch_cards, pull, pulled, push

__all__ = [
    "CARD_DETAILS",
    "CARD_NAME",
    "add_provenance",
    "fetch_cards",
    "is_folder",
    "is_repo_id",
    "pull",
    "pulled",
    "push",
    "render_card",
    "resolve_commit",
    "update_card",
    "warn_if_local",
    "warn_if_revision_differs",
    "write_card",
]
