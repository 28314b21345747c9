"""The model: OLMoE's architecture, with attention and experts as functions of several backends."""
