"""The modules of tools/validate_monitor.py: how often the monitor's verdict is right."""
