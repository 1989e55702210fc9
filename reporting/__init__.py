"""What report_confidence.py computes, each part on its own."""
