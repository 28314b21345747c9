"""The monitor in other people's trainers, and models that are not ours: transformers' mixture-of-experts families."""
