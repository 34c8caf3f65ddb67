"""What all commands share: console, settings, child processes, machine facts."""
