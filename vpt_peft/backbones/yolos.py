"""YOLOS: a ViT with detection tokens behind the patches."""

from .architecture import Architecture, Head, register_architecture

register_architecture(
    Architecture(
        model_type="yolos",
        heads={
            "YolosForObjectDetection": Head(
                "OBJECT_DETECTION",
                ("class_labels_classifier", "bbox_predictor"),
                ("class_labels_classifier.layers.2",),
                extra_outputs=1,  # "no object"
            ),
            "YolosModel": Head("FEATURE_EXTRACTION"),
        },
        layers="encoder.layer",
        q_proj="attention.query",
        k_proj="attention.key",
        v_proj="attention.value",
        o_proj="output.dense",
        caller="attention",
        mlp=("intermediate", "output.dense"),
        num_suffix_tokens=lambda encoder: int(encoder.config.num_detection_tokens),
    )
)
