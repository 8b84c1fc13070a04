"""Fine-tuning: methods, backbones, and what is added to transformers' Trainer."""
