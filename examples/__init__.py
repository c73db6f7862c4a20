"""Example tasks that are built on so101_sim."""
