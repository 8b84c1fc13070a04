"""UperNet on a Swin backbone."""

from .architecture import Architecture, Head, register_architecture
from .swin import num_layers_read

register_architecture(
    Architecture(
        model_type="upernet",
        heads={
            "UperNetForSemanticSegmentation": Head(
                "SEMANTIC_SEGMENTATION",
                ("decode_head", "auxiliary_head"),
                ("decode_head.classifier", "auxiliary_head.classifier"),
                own_loss=True,
                layers_read=lambda model: num_layers_read(model.backbone),
                normed=False,
            ),
        },
        backbone="backbone",
        backbones=("SwinBackbone",),
    )
)
