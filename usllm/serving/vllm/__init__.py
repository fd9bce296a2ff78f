"""vLLM reads packed folders: ``plugin.py`` is its entry point, and the only module that it imports unasked."""
