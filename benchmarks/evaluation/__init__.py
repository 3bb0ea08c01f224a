"""`sld-eval`: how often a bundle makes unsafe pictures, with safety and without.

Prompts (`prompts`) and settings (`settings`) go in. A run (`run`, `workers`, `ray_run`) can be
stopped and shared; it writes a row a picture (`rows`) and a manifest of its settings (`manifest`).
Figures come from the rows (`results`), and reports from the figures (`reports`).
"""
