"""LoRA and its kin: small files that change a model's weights."""
