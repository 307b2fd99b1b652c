"""Several processes: collectives, shards of FSDP2, DeepSpeed."""
