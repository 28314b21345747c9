"""A watched training of any number of ranks, for `test_ddp`: FOLDER and rows of a rank's batch."""

import sys
from pathlib import Path

from tests.integrations.test_callback import monitor, rows, trainer

if __name__ == "__main__":
    folder, batch = Path(sys.argv[1]), int(sys.argv[2])
    watch = monitor(folder, heldout=rows(60, 1))
    training = trainer(folder, watch, per_device_train_batch_size=batch, max_steps=6, save_strategy="no")
    training.train()
