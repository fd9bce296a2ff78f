"""usllm: finetune Llama models through a sub-1-bit weight sketch, and measure what is left.

Nothing heavy is imported here: ``usllm.sketch``, ``usllm.nn`` and ``usllm.calibration`` need torch alone.
"""

__version__ = "0.1.0"
