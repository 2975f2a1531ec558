"""Quantizing a model that is ONNX already: its linear layers become the waist's nodes, the passes do the rest."""
