"""ViTs that are pretrained on masked images: MAE, MSN, I-JEPA and Pixio."""

from dataclasses import replace

from .architecture import Architecture, Head, count_layers_read, register_architecture

register_architecture(
    Architecture(
        model_type="vit_mae",
        heads={  # a ViTMAEModel hides patches at random: its checkpoints are loaded into a ViT
            "ViTForImageClassification": Head("IMAGE_CLASSIFICATION", ("classifier",)),
            "ViTModel": Head("FEATURE_EXTRACTION"),
        },
    )
)
register_architecture(
    Architecture(
        model_type="vit_msn",
        heads={
            "ViTMSNForImageClassification": Head("IMAGE_CLASSIFICATION", ("classifier",)),
            "ViTMSNModel": Head("FEATURE_EXTRACTION"),
        },
    )
)
register_architecture(
    Architecture(
        model_type="ijepa",
        heads={
            "IJepaForImageClassification": Head("IMAGE_CLASSIFICATION", ("classifier",)),
            "IJepaModel": Head("FEATURE_EXTRACTION"),
        },
        num_prefix_tokens=0,
    )
)
PIXIO = Architecture(
    model_type="pixio",
    heads={"PixioModel": Head("FEATURE_EXTRACTION")},
    num_prefix_tokens=lambda encoder: int(encoder.config.n_cls_tokens),
)
register_architecture(PIXIO)
register_architecture(
    replace(
        PIXIO,
        heads={  # its norm is beside the model with the layers, whose own is not read
            "PixioBackbone": Head(
                "FEATURE_EXTRACTION",
                encoder="",
                layers_read=count_layers_read,
                normed=lambda model: bool(model.config.apply_layernorm),
                unread=("pixio.layernorm",),
            )
        },
        layers="pixio.layers",
        patch_projection="pixio.embeddings.patch_embeddings.projection",
    )
)
