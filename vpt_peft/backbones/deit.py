"""DeiT."""

from .architecture import Architecture, Head, register_architecture

register_architecture(
    Architecture(
        model_type="deit",
        heads={
            "DeiTForImageClassification": Head("IMAGE_CLASSIFICATION", ("classifier",)),
            "DeiTForImageClassificationWithTeacher": Head(
                "IMAGE_CLASSIFICATION", ("cls_classifier", "distillation_classifier")
            ),
            "DeiTForMaskedImageModeling": Head("MASKED_IMAGE_MODELING", ("decoder",)),
            "DeiTModel": Head("FEATURE_EXTRACTION"),
        },
        num_prefix_tokens=2,  # [CLS] and the distillation token
    )
)
