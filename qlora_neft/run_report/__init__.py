"""Any number of runs beside each other: read from their folders, compared, and shown as one page. No torch."""
