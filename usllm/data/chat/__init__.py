"""Conversations as sequences: ``template`` writes them in the model's own form, ``packing`` puts them side by side."""
