"""Training on several processes: collectives, shards of FSDP2, DeepSpeed."""
