"""What report_confidence.py computes and draws."""
