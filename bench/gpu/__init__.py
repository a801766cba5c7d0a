"""Everything that needs a GPU, in one command without questions: `make gpu`."""
