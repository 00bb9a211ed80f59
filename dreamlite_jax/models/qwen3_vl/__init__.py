"""Qwen3-VL, the encoder of prompts and source images: config, text, vision, model."""
