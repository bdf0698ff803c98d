"""Runs a recipe as its launcher would, and prints what weights and statistics this rank ended with."""

import hashlib

from recipes import glue


def train_and_tell(trainer, *args):
    train_and_record(trainer, *args)
    values = [value.numpy().tobytes() for value in trainer.model.state_dict().values()]
    digest = hashlib.sha256(b"".join(values)).hexdigest()
    print(f"\nrank {trainer.args.process_index} of {trainer.args.world_size}: {digest}", flush=True)


if __name__ == "__main__":
    train_and_record, glue.train_and_record = glue.train_and_record, train_and_tell
    glue.main()
