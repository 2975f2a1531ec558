"""A bundle: one folder with all that a device needs to build and check an engine, every byte accounted for.

What reads one (`paths`, `manifest`, `external_data`, `read`) imports only the standard library and onnx, for devices.
"""
