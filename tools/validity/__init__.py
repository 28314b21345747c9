"""The parts of tools/validate_monitor.py: does the monitor tell the truth?"""
