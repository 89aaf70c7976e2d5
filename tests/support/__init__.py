"""What several tests share: checkpoints made and changed, a Hub, the command line."""
