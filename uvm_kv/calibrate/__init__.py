"""From measured curves to a hardware profile."""
