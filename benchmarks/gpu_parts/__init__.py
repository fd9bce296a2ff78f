"""The parts of ``benchmarks/gpu.py``: each is a module with ``run(session)``, started in a process of its own.

``runner``, ``supervise``, ``results`` and ``schedule`` are the machinery and import neither torch nor usllm: they must
go on whatever a part does to its process or to the card.
"""
