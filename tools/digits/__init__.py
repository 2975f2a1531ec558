"""The parts of `tools/train_digits.py`: data, captions, denoiser, classifier and guided sampling."""
