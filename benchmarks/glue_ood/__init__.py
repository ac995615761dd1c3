"""GLUE-X: chosen models of `glue_lora`, out of distribution."""
