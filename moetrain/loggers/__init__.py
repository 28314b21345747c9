"""Where a run writes what it measures: TensorBoard, events, terminal, trackers, summary."""
