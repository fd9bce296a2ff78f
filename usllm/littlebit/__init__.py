"""Binary low-rank factors with scales: :mod:`usllm.compress.methods.littlebit` puts them behind the seam."""

from usllm.littlebit.config import LittleBitConfig

__all__ = ["LittleBitConfig"]
