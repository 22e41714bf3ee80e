"""The command uni-moe and what its subcommands share."""
