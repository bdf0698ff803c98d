// Draw the formulas that pymdownx.arithmatex marked: \( … \) within a line, \[ … \] on lines of their own.
document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const formula = element.textContent.trim();
    katex.render(formula.slice(2, -2), element, { displayMode: formula.startsWith("\\["), throwOnError: false });
  }
});
