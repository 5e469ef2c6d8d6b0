"""Encoders: backbones by name, and weights from elsewhere."""
