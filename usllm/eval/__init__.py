"""Measuring models: perplexity, and what a sketch does to a layer's output."""
