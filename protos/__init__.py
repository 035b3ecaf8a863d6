"""The contract: everything that crosses a border between processes."""
