"use strict";
// Reads out the cell of a heat map that the pointer is on; everything else on the page needs no script.
for (const map of document.querySelectorAll(".map")) {
  const out = map.querySelector(".readout"), idle = out.textContent;
  map.addEventListener("pointerover", (event) => {
    const cell = event.target.closest("[data-says]");
    out.textContent = cell ? cell.dataset.says : idle;
  });
  map.addEventListener("pointerleave", () => { out.textContent = idle; });
}
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details.print")) part.open = true;
});
