"""The sections of a run's settings; `moetrain.config` joins and loads them."""
