"""Figures and the HTML report, from run folders alone: no model, no data, no device.

study_plan, model_diagnosis -> loading        what the folders hold
loading -> groups -> comparison, fairness     which runs are compared, by how much they differ, and whether it is fair
comparison -> headline                        the answer, in words and as one figure
curves, studies, layers -> evidence           all other figures, as data (panels), by section
headline, evidence, tables -> analysis        all that a report says
ticks, figures (matplotlib) -> inline_svg -> page

A figure is drawn by one renderer, matplotlib, for papers and for the page alike: what the page shows is what a paper
prints, in the page's colours, and the page needs no library of its own.
"""
