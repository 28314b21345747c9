"""Writers of what a run measures: TensorBoard, events, terminal, experiment trackers, summary."""
