"""The fidelity gate: torch fake-quant = exported graph = lowered graph, layer by layer, on the reference's own inputs.

Two nets that compute the same thing still drift apart when each runs on its own activations: a quantizer turns a
1e-7 difference at a rounding boundary into a whole step. So every linear and every block is given the reference's
inputs (teacher forcing), and only the end-to-end row lets the graph run free.
"""
