"""What backends share: what they build from, and how vendor packages are found and checked."""
