"""Shared by all commands: console output, recipe settings, build options, child processes, machine facts."""
