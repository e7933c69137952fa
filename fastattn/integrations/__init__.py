"""fastattn inside models and libraries that exist already."""

from fastattn.integrations.replace import ReplacementReport, replace_multihead_attention

__all__ = ["ReplacementReport", "replace_multihead_attention"]
