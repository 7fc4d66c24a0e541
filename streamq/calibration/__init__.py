"""Calibration data: settings and cost (`settings`), the stored set (`store`), and what makes one (the other files).

`settings` and `store` need no torch, so that a plan can speak of data that is there or will be made.
"""
