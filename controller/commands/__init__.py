"""The subcommands of `phalanx`, one module each; heavy imports wait until a command runs."""
