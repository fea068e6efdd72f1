"""Where the time goes: kernel clocks, roofline, tables and traces."""
