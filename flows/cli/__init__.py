"""The command `cotrain`, one file per noun. Heavy packages load only in the commands that need them."""
