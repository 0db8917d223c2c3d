"use strict";
const story = JSON.parse(document.getElementById("story").textContent);
const slider = document.getElementById("slider");
const button = document.getElementById("play");
let playing = null;

function all(selector) {
  return document.querySelectorAll(selector);
}

function show(i) {
  const moment = story.moments[i];
  for (const image of all("img[data-view]")) {
    image.src = story.views[image.dataset.view][image.dataset.at ?? i];
  }
  for (const place of all("[data-text]")) place.textContent = moment[place.dataset.text];
  for (const dot of all(".here")) {
    dot.setAttribute("cx", moment.x);
    dot.setAttribute("cy", moment.y);
  }
  all(".lit").forEach((box, word) => {
    box.style.setProperty("--mask", `url(${moment.masks[word]})`);
  });
  all("[data-share]").forEach((place, word) => {
    place.textContent = moment.shares[word];
  });
}

function go(i) {
  slider.value = i;
  show(Number(slider.value));
}

function stop() {
  clearInterval(playing);
  playing = null;
  button.textContent = "▶";
  button.setAttribute("aria-label", "Play");
}

button.addEventListener("click", () => {
  if (playing) return stop();
  if (slider.value === slider.max) go(0);
  button.textContent = "❚❚";
  button.setAttribute("aria-label", "Stop");
  playing = setInterval(() => {
    if (slider.value === slider.max) stop();
    else go(Number(slider.value) + 1);
  }, 350);
});

slider.addEventListener("input", () => show(Number(slider.value)));

// The arrow keys work everywhere on the page, not only on the slider.
document.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by && event.target !== slider) go(Number(slider.value) + by);
});

show(Number(slider.value));
