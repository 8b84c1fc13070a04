"""ViT."""

from .architecture import Architecture, Head, register_architecture

register_architecture(
    Architecture(
        model_type="vit",
        heads={
            "ViTForImageClassification": Head("IMAGE_CLASSIFICATION", ("classifier",)),
            "ViTForMaskedImageModeling": Head("MASKED_IMAGE_MODELING", ("decoder",)),
            "ViTModel": Head("FEATURE_EXTRACTION"),
        },
    )
)
